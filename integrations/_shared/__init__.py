"""What the frameworks' adapters have in common; it knows none of the frameworks."""

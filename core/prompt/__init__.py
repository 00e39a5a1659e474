"""What is asked, and how it becomes tokens that know where they came from."""

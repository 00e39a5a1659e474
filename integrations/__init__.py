"""Framework adapters and the command line; each adapter is one core call."""

"""Questions over text that people wrote, read from files, and the contexts built around them."""

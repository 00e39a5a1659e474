"""The recipe that trains the bundled pair `builtin:target` and `builtin:draft`."""

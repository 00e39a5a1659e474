"""SpecPC: the draft's attention chooses which prompt tokens stay."""

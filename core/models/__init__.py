"""Loading models, and the one place that looks into their attention."""

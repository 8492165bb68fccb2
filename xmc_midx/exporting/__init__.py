"""Layer 5. A trained model as files that other programs load; see the modules."""

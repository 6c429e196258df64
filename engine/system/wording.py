"""Quantities in words, for people."""


def duration(hours):
    """Return hours as text, in minutes or seconds where that says more."""
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours * 60 >= 1 else f"{hours * 3600:.0f} seconds"

"""The folder that a conversion writes."""

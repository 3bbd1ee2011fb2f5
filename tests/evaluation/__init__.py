"""Labelled training runs, recorded once and replayed through detection and diagnosis."""

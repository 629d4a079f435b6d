"""Helpers that every layer may use: logging, ranks, hardware tables."""

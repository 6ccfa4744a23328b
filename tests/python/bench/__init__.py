"""Tests of vivace.bench."""

"""Commands that users run: their options, and what they print."""

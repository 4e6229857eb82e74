"""From raw files to tokens and loss masks."""

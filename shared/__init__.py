"""The protocol both sides speak, and the shell they share."""

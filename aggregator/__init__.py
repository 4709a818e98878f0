"""The daemon that folds updates into releases, and the operator's command."""

"""The daemon of a device: decides when to train, trains, delivers the update."""

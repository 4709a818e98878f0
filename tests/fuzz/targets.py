"""Every parser under attack."""

from tests.fuzz import downloads, graphs, parsers, settings, signed

TARGETS = {
    target.name: target for module in (parsers, signed, graphs, settings, downloads) for target in module.TARGETS
}

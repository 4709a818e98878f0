"""The version of Fieldfare; the package metadata reads it from here."""

VERSION = "0.2.0"

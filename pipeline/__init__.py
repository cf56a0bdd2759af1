"""What the stages agree on, and the front door: raw text -> prepare -> shards -> train -> checkpoint -> sample -> text."""

__version__ = "0.1.0"

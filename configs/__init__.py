"""Packaged configs: ``lightning predict --config NAME.yaml`` finds them in any folder."""

"""Callbacks for training loops that libraries run. Each module needs an extra of its own. Nothing of `hpo` imports them."""

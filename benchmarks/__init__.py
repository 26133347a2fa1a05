"""One file a question: ``python -m benchmarks.NAME [--quick] [--json FILE]``; results/ holds the committed ones."""

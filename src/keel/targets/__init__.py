"""What distribution a method aims at, apart from how it gets there."""

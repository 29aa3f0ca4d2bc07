"""Named compositions: one file a family, one function a method."""

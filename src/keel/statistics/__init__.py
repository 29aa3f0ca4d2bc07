"""What losses ask of models: functionals, transforms, and the engine that measures and differentiates them."""

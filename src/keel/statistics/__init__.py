"""What losses ask of models: functionals, distribution transforms, and the engine that measures and differentiates them."""

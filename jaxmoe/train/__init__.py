"""The small trainer: the default model, predictors and distillation."""

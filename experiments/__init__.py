"""The laboratory around `lm`: studies, tracking, figures, serving."""

"""The model and its training. Knows neither MLflow, Optuna nor Plotly."""

"""Optuna's tables and ours: the engine, the statements, and Optuna's storage on them. It knows no study of ours."""

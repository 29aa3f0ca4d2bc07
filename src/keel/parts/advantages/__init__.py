"""Advantage estimators: from rewards to the credit of each token, rows -> rows."""

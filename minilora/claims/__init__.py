"""What the papers claim, checked: one function a claim, from runs to a page."""

"""The default recipe, whole: its data (pages of handwriting and charts), its pre-trained start and how that was made."""

"""Many trainings of one recipe: the published table and the study of tau."""

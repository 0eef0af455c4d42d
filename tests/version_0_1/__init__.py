"""What was done with version 0.1 when the files in tests/data/v0_1 were made, to be done again by any later one.

Only what a user may write: no module here imports anything below `restrain` but `restrain.integrations`.
"""

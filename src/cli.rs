//! Turns a command line into a call and an exit code.

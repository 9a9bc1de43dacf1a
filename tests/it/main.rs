//! The integration tests: the real kernel, each test in a network namespace of its own.

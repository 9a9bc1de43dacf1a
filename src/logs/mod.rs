//! Where lines come from: files come in, chunks of whole lines go out.

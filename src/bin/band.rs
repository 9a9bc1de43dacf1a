//! The daemon; everything it does is in the library.

fn main() -> std::process::ExitCode {
    band::daemon::run()
}

//! The `ploopfs` program.
#![cfg_attr(not(test), deny(clippy::disallowed_methods))]

fn main() -> std::process::ExitCode {
    ploopfs::main(std::env::args_os())
}

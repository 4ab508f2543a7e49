//! The `ploopfs` program.

fn main() -> std::process::ExitCode {
    ploopfs::cli::main(std::env::args_os())
}

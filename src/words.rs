//! Names in commands that a message suggests, for the shell into which they are pasted. Names come from elsewhere: what
//! they say must not run.

use std::ffi::OsStr;
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;

/// `name` as one word of a shell: as it is where that is safe, else in quotes. In what is pasted it stands for that name
/// and nothing else.
pub fn quoted(name: impl AsRef<OsStr>) -> String {
    let bytes = name.as_ref().as_bytes();
    let safe = |b: &u8| b.is_ascii_alphanumeric() || b"/._-+:@%=,".contains(b);
    // In front, a dash would make it an option; an equals sign an assignment, but never behind the command's name.
    let option = if bytes.starts_with(b"-") { "./" } else { "" };
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.is_empty() && bytes.iter().all(safe) => format!("{option}{text}"),
        Ok(text) if !text.chars().any(char::is_control) => {
            format!("'{option}{}'", text.replace('\'', r"'\''"))
        }
        // Quotes that know escapes: bash, zsh, ksh, and POSIX since 2024.
        _ => {
            let mut text = format!("$'{option}");
            for byte in bytes {
                // Writing into a String cannot fail.
                let _ = match byte {
                    b'\'' | b'\\' => write!(text, "\\{}", char::from(*byte)),
                    b' '..=b'~' => write!(text, "{}", char::from(*byte)),
                    // Always three digits: a digit that follows is none of it.
                    _ => write!(text, "\\{byte:03o}"),
                };
            }
            text + "'"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_quoted_name_is_one_word_of_a_shell_whatever_is_in_it() {
        let names: [&[u8]; 14] = [
            b"images/vm1.hds",
            b"my disk",
            b"it's",
            b"a; touch PWNED #",
            b"b$(touch PWNED)",
            b"`id`",
            b"\\",
            b"~",
            b"*",
            b"",
            "gr\u{fc}n \u{4e16}".as_bytes(),
            b"a\nb\t1",
            b"\xff1'\\\x1b[2J",
            b"!x",
        ];
        for name in names {
            let name = OsStr::from_bytes(name);
            let line = format!("printf %s {}", quoted(name));
            assert!(!line.chars().any(char::is_control), "{line:?}");
            let done = Command::new("bash").args(["-c", &line]).output().expect("bash");
            assert_eq!(OsStr::from_bytes(&done.stdout), name, "{line}");
        }
        assert_eq!(quoted("images/vm1.hds"), "images/vm1.hds");
        assert_eq!(quoted("-rf"), "./-rf");
        assert_eq!(quoted("-r f"), "'./-r f'");
    }
}

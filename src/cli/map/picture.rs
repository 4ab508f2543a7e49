//! A map for the terminal: 24 lines of 80 columns.

use std::fmt::Write;

use super::cells::{COLUMNS, CellLook, Drawing};
use super::source::{LevelInfo, MapSource};
use crate::cli::size;

/// Levels, and parts of a disk, in one character.
const DIGITS: &[u8; 62] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
/// Lines of the legend for levels: with the rest of the picture they fill a screen.
const LEGEND: usize = 4;
/// Columns of a screen.
const WIDTH: usize = 80;
/// Colours of levels in a terminal's table of 256: bright enough on black, dark enough on white.
const COLOURS: [u8; 8] = [33, 208, 35, 169, 178, 73, 99, 160];

fn symbol(look: CellLook) -> char {
    match look {
        CellLook::Nothing => '.',
        CellLook::Hole => '-',
        CellLook::Damaged => '!',
        CellLook::Level(level) => DIGITS.get(usize::from(level)).map_or('+', |digit| char::from(*digit)),
    }
}

/// The picture. `colours`: with the escapes of a terminal.
pub(super) fn draw(drawing: &Drawing, source: &MapSource, colours: bool) -> String {
    let mut text = String::new();
    // Writing into a String cannot fail.
    let _ = writeln!(text, "{}", cut(&format!("{}, {}", source.title(), size::human(drawing.size)), WIDTH));
    let _ = writeln!(text, "A character is {}, and shows the level that most of its data lies in.", {
        size::human(drawing.width)
    });
    let looks: Vec<CellLook> = drawing.looks().collect();
    for (index, row) in looks.chunks(COLUMNS).enumerate() {
        let start = size::human((index * COLUMNS) as u64 * drawing.width);
        let _ = writeln!(text, "{start:>10}  {}", coloured(row, colours));
    }
    legend(drawing, source, &mut text);
    in_files(drawing, source, &mut text);
    text
}

fn coloured(row: &[CellLook], colours: bool) -> String {
    let mut text = String::new();
    for part in row.chunk_by(|a, b| a == b) {
        let symbols: String = part.iter().map(|look| symbol(*look)).collect();
        let _ = match part[0] {
            CellLook::Level(level) if colours => {
                let colour = COLOURS[usize::from(level) % COLOURS.len()];
                write!(text, "\x1b[38;5;{colour}m{symbols}\x1b[0m")
            }
            CellLook::Damaged if colours => write!(text, "\x1b[1;31m{symbols}\x1b[0m"),
            _ => write!(text, "{symbols}"),
        };
    }
    text
}

/// The levels with the most data, the uppermost first, what they have, and the rest in a line.
fn legend(drawing: &Drawing, source: &MapSource, text: &mut String) {
    let mut numbers: Vec<usize> = (0..drawing.shares.len()).collect();
    let all = numbers.len();
    if all > LEGEND {
        numbers.sort_by_key(|number| std::cmp::Reverse(drawing.shares[*number].data));
        numbers.truncate(LEGEND - 1);
    }
    numbers.sort_unstable();
    for number in numbers.iter().rev() {
        let (share, level) = (&drawing.shares[*number], &source.levels()[*number]);
        let what = format!("{}, {}", size::human(share.data), pieces(share.pieces));
        let _ = writeln!(text, "{}", cut(&line(*number as u16, &what, level), WIDTH));
    }
    if all > LEGEND {
        let others = (0..all).filter(|number| !numbers.contains(number));
        let bytes = others.map(|number| drawing.shares[number].data).sum();
        let _ = writeln!(text, "   and {} in {} other levels", size::human(bytes), all - numbers.len());
    }
    let holes: u64 = drawing.shares.iter().map(|share| share.holes).sum();
    if holes > 0 {
        let _ = writeln!(text, " - holes of a file inside its clusters: {}", size::human(holes));
    }
    if drawing.damaged > 0 {
        let _ = writeln!(text, " ! damaged: {}; see ploopfs check", size::human(drawing.damaged));
    }
    let _ = writeln!(text, " . nothing: {}", size::human(drawing.nothing));
}

fn pieces(count: u64) -> String {
    match count {
        0 => "nothing of this disk".to_owned(),
        1 => "in one piece".to_owned(),
        _ => format!("in {count} pieces"),
    }
}

fn line(number: u16, what: &str, level: &LevelInfo) -> String {
    let symbol = symbol(CellLook::Level(number));
    format!(
        " {symbol} level {number}, {}: {what}, {}",
        crate::cli::out::printable(&level.label),
        level.file_name()
    )
}

/// The two levels with the most data, as their files have them.
fn in_files(drawing: &Drawing, source: &MapSource, text: &mut String) {
    let mut numbers: Vec<usize> = (0..source.levels().len()).collect();
    numbers.retain(|number| drawing.shares[*number].data > 0);
    numbers.sort_by_key(|number| std::cmp::Reverse(drawing.shares[*number].data));
    numbers.truncate(2);
    if !numbers.is_empty() {
        let _ = writeln!(text, "In the file, front to back, lies this part of the disk (0 first, Z last):");
    }
    for number in numbers {
        let cell = |disk: Option<u64>| match disk {
            None => ' ',
            Some(disk) => {
                let part = u128::from(disk) * DIGITS.len() as u128 / u128::from(drawing.size.max(1));
                char::from(DIGITS[(part as usize).min(DIGITS.len() - 1)])
            }
        };
        let cells: String = drawing.shares[number].file().map(cell).collect();
        let _ = writeln!(text, "{:>10} [{cells}]", format!("level {number}"));
    }
}

/// At most `width` characters.
fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().take(width.saturating_sub(3)).collect();
    kept + "..."
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_long_is_cut_and_says_so() {
        assert_eq!(cut("short", 5), "short");
        assert_eq!(cut("too long", 6), "too...");
    }

    #[test]
    fn levels_have_symbols_as_long_as_there_are_any() {
        let symbols = [0, 9, 10, 61, 62, 249].map(|level| symbol(CellLook::Level(level)));
        assert_eq!(symbols, ['0', '9', 'a', 'Z', '+', '+']);
    }

    #[test]
    fn colours_wrap_runs_and_change_no_character() {
        let row = [CellLook::Nothing, CellLook::Level(0), CellLook::Level(0), CellLook::Damaged];
        assert_eq!(coloured(&row, false), ".00!");
        assert_eq!(coloured(&row, true), ".\x1b[38;5;33m00\x1b[0m\x1b[1;31m!\x1b[0m");
    }
}

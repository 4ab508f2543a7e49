//! A map as a picture: the disk in squares, the colour says which level; below it each file from front to back, the colour
//! says which part of the disk lies there, so that a file in order is a smooth run from dark to bright.

use std::fmt::Write;

use super::cells::{COLUMNS, CellLook, Drawing};
use super::source::MapSource;
use crate::cli::size;

/// Edge of a square, in pixels.
const EDGE: usize = 14;
const LEFT: usize = 90;
const WIDTH: usize = LEFT + COLUMNS * EDGE + 20;
/// Height of a line of text.
const LINE: usize = 20;
/// Levels whose files are drawn: more would make a picture that shows nothing.
const FILES: usize = 40;
/// Colours that differ for every kind of colour vision (Okabe and Ito); further levels begin anew, darker.
const COLOURS: [[u8; 3]; 7] = [
    [0, 114, 178],
    [230, 159, 0],
    [0, 158, 115],
    [204, 121, 167],
    [86, 180, 233],
    [213, 94, 0],
    [240, 228, 66],
];
/// From the beginning of a disk to its end.
const ORDER: [[u8; 3]; 5] = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

fn hex([r, g, b]: [u8; 3]) -> String {
    format!("#{r:02x}{g:02x}{b:02x}")
}

fn level_colour(level: usize) -> String {
    let darker = (level / COLOURS.len()).min(4) as u32;
    hex(COLOURS[level % COLOURS.len()].map(|part| (u32::from(part) * (10 - 2 * darker) / 10) as u8))
}

fn look_colour(look: CellLook) -> String {
    match look {
        CellLook::Nothing => "#f2f2f2".to_owned(),
        CellLook::Hole => "#c8c8c8".to_owned(),
        CellLook::Damaged => "#ff0000".to_owned(),
        CellLook::Level(level) => level_colour(usize::from(level)),
    }
}

/// The colour of byte `disk` of a disk of `size` bytes.
fn order_colour(disk: u64, size: u64) -> String {
    let steps = ORDER.len() as u128 - 1;
    let place = u128::from(disk) * steps * 256 / u128::from(size.max(1));
    let (step, part) = ((place / 256).min(steps - 1) as usize, (place % 256) as i32);
    let mix = |i: usize| {
        let (a, b) = (i32::from(ORDER[step][i]), i32::from(ORDER[step + 1][i]));
        (a + (b - a) * part / 256) as u8
    };
    hex([mix(0), mix(1), mix(2)])
}

/// Text as SVG has it: no markup comes from a name, and no character that XML forbids.
fn escaped(text: &str) -> String {
    let mut safe = String::new();
    for c in crate::cli::out::printable(text).chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\u{fffe}' | '\u{ffff}' => safe.push('?'),
            c => safe.push(c),
        }
    }
    safe
}

/// The picture.
pub(super) fn draw(drawing: &Drawing, source: &MapSource) -> String {
    let mut canvas = Canvas { body: String::new(), y: 28 };
    canvas.text(20, 16, &format!("{}, {}", source.title(), size::human(drawing.size)));
    canvas.line(&format!("a square is {}, in the colour of the level that most of its data lies in", {
        size::human(drawing.width)
    }));
    canvas.y += 8;
    let looks: Vec<CellLook> = drawing.looks().collect();
    for (index, row) in looks.chunks(COLUMNS).enumerate() {
        canvas.label(&size::human((index * COLUMNS) as u64 * drawing.width));
        for (column, look) in row.iter().enumerate() {
            canvas.square(column, 1, &look_colour(*look));
        }
        canvas.y += EDGE;
    }
    canvas.y += LINE;
    for (number, share) in drawing.shares.iter().enumerate().rev() {
        let (data, pieces) = (size::human(share.data), share.pieces);
        let level = &source.levels()[number];
        let what =
            format!("level {number}, {}: {data} in {pieces} pieces, {}", level.label, level.file_name());
        canvas.legend(&level_colour(number), &what);
    }
    let holes: u64 = drawing.shares.iter().map(|share| share.holes).sum();
    canvas.legend(&look_colour(CellLook::Hole), &format!("holes inside clusters: {}", size::human(holes)));
    canvas.legend(&look_colour(CellLook::Nothing), &format!("nothing: {}", size::human(drawing.nothing)));
    if drawing.damaged > 0 {
        canvas.legend(&look_colour(CellLook::Damaged), &format!("damaged: {}", size::human(drawing.damaged)));
    }
    canvas.y += 8;
    canvas.line("each file, front to back; from the dark begin of the disk to its bright end:");
    let mut numbers: Vec<usize> = (0..drawing.shares.len()).filter(|n| drawing.shares[*n].data > 0).collect();
    numbers.sort_by_key(|number| std::cmp::Reverse(drawing.shares[*number].data));
    for number in numbers.iter().take(FILES) {
        canvas.label(&format!("level {number}"));
        for (column, disk) in drawing.shares[*number].file().enumerate() {
            let colour = disk.map_or_else(|| "#f2f2f2".to_owned(), |disk| order_colour(disk, drawing.size));
            canvas.square(column, 0, &colour);
        }
        canvas.y += EDGE + 4;
    }
    if numbers.len() > FILES {
        canvas.line(&format!("and {} more", numbers.len() - FILES));
    }
    canvas.end()
}

/// What is drawn so far, and where the next line goes.
struct Canvas {
    body: String,
    y: usize,
}

impl Canvas {
    fn text(&mut self, x: usize, size: usize, text: &str) {
        let y = self.y;
        // Writing into a String cannot fail.
        let _ = writeln!(self.body, r#"<text x="{x}" y="{y}" font-size="{size}">{}</text>"#, escaped(text));
    }

    fn line(&mut self, text: &str) {
        self.y += LINE;
        self.text(20, 12, text);
        self.y += 4;
    }

    /// What stands left of a row of squares.
    fn label(&mut self, text: &str) {
        let y = self.y + EDGE - 3;
        let (x, text) = (LEFT - 6, escaped(text));
        let _ =
            writeln!(self.body, r#"<text x="{x}" y="{y}" font-size="11" text-anchor="end">{text}</text>"#);
    }

    fn square(&mut self, column: usize, gap: usize, colour: &str) {
        let (x, y, width, height) = (LEFT + column * EDGE, self.y, EDGE - gap, EDGE - gap);
        let _ = writeln!(
            self.body,
            r#"<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{colour}"/>"#
        );
    }

    fn legend(&mut self, colour: &str, text: &str) {
        self.square(0, 2, colour);
        self.y += EDGE - 3;
        self.text(LEFT + EDGE + 6, 12, text);
        self.y += LINE - EDGE + 3;
    }

    fn end(self) -> String {
        let height = self.y + 16;
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
             <svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
             viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" fill=\"#202020\">\n\
             <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n{}</svg>\n",
            self.body
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_bring_no_markup() {
        assert_eq!(escaped("a<b>&\"c\"\x1b"), "a&lt;b&gt;&amp;&quot;c&quot;\\u{1b}");
    }

    #[test]
    fn the_disks_begin_is_dark_and_its_end_bright() {
        assert_eq!(order_colour(0, 1000), "#440154");
        assert_eq!(order_colour(500, 1000), "#21918c");
        assert!(order_colour(999, 1000).starts_with("#fb"));
        assert_eq!(order_colour(0, 0), "#440154");
    }

    #[test]
    fn levels_next_to_each_other_have_different_colours() {
        for level in 0..30 {
            assert_ne!(level_colour(level), level_colour(level + 1));
        }
        assert_ne!(level_colour(0), level_colour(7));
    }
}

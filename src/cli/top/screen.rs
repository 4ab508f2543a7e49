//! The terminal: taken, drawn on, and given back as it was.

use std::io::{self, Stdout, Write};
use std::time::Duration;

use crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use crossterm::terminal::{self, ClearType};
use crossterm::{cursor, queue, style};

use crate::error::{Error, Kind, Result};

/// A line, and how it stands out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    /// Its text, no wider than the screen.
    pub text: String,
    /// How it is drawn.
    pub look: LineLook,
}

/// How a line is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LineLook {
    /// As text is.
    Plain,
    /// The head of a table.
    Head,
    /// Less important.
    Faint,
    /// Something is wrong.
    Alarm,
}

/// What came from the keyboard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScreenEvent {
    /// Nothing, in the time given.
    Nothing,
    /// The terminal has another size now.
    Resized,
    /// q, Esc or Ctrl-C.
    Quit,
    /// Another key.
    Key(Key),
}

/// A key that means something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// A letter.
    Letter(char),
    /// One line up.
    Up,
    /// One line down.
    Down,
    /// A screen up.
    PageUp,
    /// A screen down.
    PageDown,
}

/// The terminal while it is ours; dropping it gives it back.
pub(super) struct Screen {
    out: Stdout,
    stale: bool,
}

fn cannot(e: &io::Error) -> Error {
    Error::new(Kind::Io, format!("cannot use the terminal: {e}; --once prints one measurement"))
}

impl Screen {
    /// Takes the terminal: keys come one by one, and what stands there comes back at the end.
    pub(super) fn open() -> Result<Screen> {
        terminal::enable_raw_mode().map_err(|e| cannot(&e))?;
        // From here on there is something to give back.
        let mut screen = Screen { out: io::stdout(), stale: true };
        queue!(screen.out, terminal::EnterAlternateScreen, cursor::Hide)
            .and_then(|()| screen.out.flush())
            .map_err(|e| cannot(&e))?;
        Ok(screen)
    }

    /// Columns and rows.
    pub(super) fn size(&self) -> Result<(usize, usize)> {
        let (columns, rows) = terminal::size().map_err(|e| cannot(&e))?;
        Ok((usize::from(columns), usize::from(rows)))
    }

    /// True when what stands there is old.
    pub(super) fn is_stale(&self) -> bool {
        self.stale
    }

    /// What stands there is old.
    pub(super) fn make_stale(&mut self) {
        self.stale = true;
    }

    /// Draws all lines anew, in one write, so that nothing flickers.
    pub(super) fn draw(&mut self, lines: &[Line]) -> Result<()> {
        use style::{Attribute, SetAttribute};
        let mut frame = Vec::new();
        let drawn = (|| {
            for (row, line) in lines.iter().enumerate() {
                queue!(frame, cursor::MoveTo(0, row as u16))?;
                let attribute = match line.look {
                    LineLook::Plain => Attribute::Reset,
                    LineLook::Head => Attribute::Reverse,
                    LineLook::Faint => Attribute::Dim,
                    LineLook::Alarm => Attribute::Bold,
                };
                queue!(
                    frame,
                    SetAttribute(attribute),
                    style::Print(&line.text),
                    SetAttribute(Attribute::Reset)
                )?;
                queue!(frame, terminal::Clear(ClearType::UntilNewLine))?;
            }
            queue!(frame, terminal::Clear(ClearType::FromCursorDown))?;
            self.out.write_all(&frame)?;
            self.out.flush()
        })();
        self.stale = false;
        drawn.map_err(|e: io::Error| cannot(&e))
    }

    /// Waits for a key, `patience` at most.
    pub(super) fn wait(&mut self, patience: Duration) -> Result<ScreenEvent> {
        match event::poll(patience) {
            Ok(false) => return Ok(ScreenEvent::Nothing),
            // A signal; who sent it is looked at elsewhere.
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(ScreenEvent::Nothing),
            Err(e) => return Err(cannot(&e)),
            Ok(true) => {}
        }
        let key = match event::read().map_err(|e| cannot(&e))? {
            Event::Resize(..) => return Ok(ScreenEvent::Resized),
            Event::Key(key) if key.kind != KeyEventKind::Release => key,
            _ => return Ok(ScreenEvent::Nothing),
        };
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        Ok(match key.code {
            KeyCode::Char('c' | 'd') if control => ScreenEvent::Quit,
            KeyCode::Char('l') if control => ScreenEvent::Resized,
            KeyCode::Char('q') | KeyCode::Esc => ScreenEvent::Quit,
            KeyCode::Char(letter) if !control => ScreenEvent::Key(Key::Letter(letter)),
            KeyCode::Up => ScreenEvent::Key(Key::Up),
            KeyCode::Down => ScreenEvent::Key(Key::Down),
            KeyCode::PageUp => ScreenEvent::Key(Key::PageUp),
            KeyCode::PageDown => ScreenEvent::Key(Key::PageDown),
            _ => ScreenEvent::Nothing,
        })
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Where the terminal is gone there is nothing to give back.
        let _ = queue!(self.out, cursor::Show, terminal::LeaveAlternateScreen);
        let _ = self.out.flush();
        let _ = terminal::disable_raw_mode();
    }
}

//! libcontainer names the cause of a failure in its error events, and in the error that it returns often only the kind.
//!
//! This subscriber keeps the first event of level "error" of each process; libcontainer's innermost cause comes first.

use std::fmt::{Debug, Write};
use std::sync::{Mutex, OnceLock};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

static FIRST: Mutex<Option<String>> = Mutex::new(None);
static INSTALLED: OnceLock<()> = OnceLock::new();

/// Starts to listen.
pub fn install() {
    INSTALLED.get_or_init(|| drop(tracing::subscriber::set_global_default(Errors)));
}

/// The first error event of this process.
pub fn first() -> Option<String> {
    crate::lock(&FIRST).clone()
}

struct Errors;

impl Subscriber for Errors {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR && metadata.is_event()
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        let text = format!("{}{}", text.message, text.fields);
        // A process that libcontainer cloned cannot hand its memory back, so it says it here and now.
        if text.contains("failed to chdir") {
            super::cwd::report_failure(&text);
        }
        let mut first = crate::lock(&FIRST);
        if first.is_none() {
            *first = Some(text);
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, ", {name}: {value:?}"),
        };
    }
}

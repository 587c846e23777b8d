//! What a container asks for.

use std::collections::HashMap;

use toml::Value;

use super::{ANNOTATION, Origin, Settings, SettingsError, keys};

pub(super) fn apply(settings: &Settings, annotations: &HashMap<String, String>) -> Result<Settings, SettingsError> {
    let mut asked = settings.clone();
    for (name, text) in annotations {
        let Some(key) = name.strip_prefix(ANNOTATION) else { continue };
        // An unknown one is told as such below.
        if keys::find(key).is_ok() && !settings.allows(name) {
            return Err(SettingsError::NotAllowed(name.clone()));
        }
        asked.set(key, value(text), Origin::Annotation(name.clone()))?;
    }
    Ok(asked)
}

/// An annotation is a text, whatever it means.
fn value(text: &str) -> Value {
    match (text.parse(), text.parse()) {
        (Ok(number), _) => Value::Integer(number),
        (_, Ok(flag)) => Value::Boolean(flag),
        _ => Value::String(text.to_owned()),
    }
}

//! Which of how many measurements is running, on standard error; nothing when nobody watches.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The measurements of one run, in a row.
pub(crate) struct Steps(ProgressBar);

impl Steps {
    pub(crate) fn new(measurements: u64) -> Self {
        let bar = ProgressBar::with_draw_target(Some(measurements), ProgressDrawTarget::stderr());
        let style = "measurement {pos} of {len} [{bar:20}] {elapsed_precise} {msg}";
        bar.set_style(ProgressStyle::with_template(style).expect("the template is well-formed").progress_chars("=> "));
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    /// The next measurement begins.
    pub(crate) fn begin(&self, what: impl Into<String>) {
        self.0.inc(1);
        self.0.set_message(what.into());
    }

    /// What goes on before or within it.
    pub(crate) fn say(&self, what: impl Into<String>) {
        self.0.set_message(what.into());
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

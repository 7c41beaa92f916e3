// This file tests Off, and what a change of the mode does.

package replay

import (
	"strings"
	"testing"
)

func TestModes(t *testing.T) {
	for _, name := range []string{"unacked", "unsent", "strict", "off"} {
		m, err := ParseMode(name)
		if err != nil || m.String() != name {
			t.Errorf("%s: got %v, error %v", name, m, err)
		}
	}
	for _, name := range []string{"", "Off", "acked"} {
		if _, err := ParseMode(name); err == nil || !strings.Contains(err.Error(), "want unacked, unsent, strict or off") {
			t.Errorf("%q: got error %v, want one that names the modes", name, err)
		}
	}
	if got := Mode(9).String(); got != "Mode(9)" {
		t.Errorf("got %s, want Mode(9)", got)
	}
}

func TestUnderOffNothingIsKept(t *testing.T) {
	c := start(t, Off)
	c.down = true
	c.unit("<a>", Full)
	c.down = false
	c.unit("<a>", Passed)
	c.unit("<b>", Passed)
	c.write(-1)
	c.holds("")
	c.lost(0, Resume, 0)
	c.unit("<c", Passed)
	c.write(-1)
	c.down = true
	c.unit("c", Full)
	c.lost(0, Resume, 0)
	c.unit("c", Dropped)
	if !c.Empty() {
		t.Error("got something for the next backend, want nothing")
	}
	c.unit("c>", Dropped)
	c.unit("<d>", Full)
	c.down = false
	c.unit("<d", Passed)
	if c.Boundary() {
		t.Error("got a boundary before what was passed")
	}
	c.lost(0, Resume, 0) // passed, but not even sent
	c.unit("d>", Dropped)
	c.holds("")
}

func TestUnderOffNothingOvertakesWhatWasKept(t *testing.T) {
	c := start(t, Unacked)
	c.unit("<a>", Kept)
	c.unit("<b", Kept)
	c.mode = Off
	c.unit("b>", Kept) // begun when messages were kept
	c.write(3)
	c.holds("<bb>")
	c.unit("<c>", Full)
	c.lost(0, Resume, 0)
	c.pending(false, "<bb>")
	c.Sent(4)
	c.unit("<c>", Passed)
	c.holds("")
}

func TestModeChanges(t *testing.T) {
	for _, test := range []struct {
		name          string
		before, after Mode
		verdict       Verdict
		next          string
	}{
		{"what was freed is not replayed", Unsent, Unacked, Resume, "<c>"},
		{"what was written is in doubt", Unsent, Strict, InDoubt, ""},
		{"what was written is not repeated", Unacked, Unsent, Resume, "<c>"},
		{"what was passed is no doubt", Off, Unacked, Resume, "<c>"},
		{"what was passed and is not known to be read", Off, Strict, InDoubt, ""},
		{"what was never written is not lost", Unacked, Off, Resume, "<c>"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := start(t, test.before)
			fate := Kept
			if test.before == Off {
				fate = Passed
			}
			c.unit("<a>", fate)
			c.unit("<b>", fate)
			c.write(-1)
			if test.after != Off {
				c.mode = test.after
			}
			c.unit("<c>", Kept)
			c.mode = test.after
			c.lost(0, test.verdict, 0)
			if test.verdict == Resume {
				c.pending(false, test.next)
			}
		})
	}
}

// A message that an earlier backend got whole was written, also if the current
// one did not get that far.
func TestModeChangeAfterALoss(t *testing.T) {
	for _, test := range []struct {
		mode    Mode
		verdict Verdict
		next    string
	}{
		{Unsent, Resume, "<c>"},
		{Strict, InDoubt, ""},
		{Off, Resume, "<c>"},
	} {
		c := start(t, Unacked)
		c.unit("<a>", Kept)
		c.unit("<b>", Kept)
		c.unit("<c>", Kept)
		c.write(6)
		c.lost(0, Resume, 2)
		c.mode = test.mode
		c.lost(0, test.verdict, 0)
		if test.verdict == Resume {
			c.pending(false, test.next)
		}
	}
}

func TestUnkeptMessageBreaksUnderOtherModes(t *testing.T) {
	c := start(t, Off)
	c.unit("<a", Passed)
	c.write(-1)
	c.mode = Unacked
	c.lost(0, Torn, 0)

	c = start(t, Off)
	c.unit("<a>", Passed)
	c.Sent(3)
	c.Unsent(1)
	c.mode = Unacked
	c.lost(0, Torn, 0)
}

// What Off freed while it was being written is missing when that write fails.
func TestFreedInFlight(t *testing.T) {
	for _, test := range []struct {
		mode Mode
		want Verdict
	}{{Off, Resume}, {Unacked, Torn}, {Unsent, Torn}} {
		c := start(t, Unacked)
		c.unit("<a>", Kept)
		c.Sent(3)
		c.mode = Off
		c.unit("<b>", Passed)
		c.Unsent(1)
		c.mode = test.mode
		c.lost(0, test.want, 0)
	}
}

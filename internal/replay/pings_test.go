// This file tests which pings a pong answers.

package replay

import (
	"fmt"
	"reflect"
	"testing"
)

func TestPongs(t *testing.T) {
	own := func(s string) string { return "own " + s }
	for _, test := range []struct {
		name  string
		sent  []string // "own …" is the proxy's; positions are 10, 20, …
		pong  string
		want  Match
		after int // own pings that wait then
	}{
		{"own", []string{own("a")}, own("a"), Match{true, true, 10, nil}, 0},
		{"the client's", []string{"a"}, "a", Match{true, false, 10, nil}, 0},
		{"unasked", []string{own("a"), "b"}, "c", Match{}, 1},
		{"no ping at all", nil, "", Match{}, 0},
		{"empty payload is a payload", []string{own("a"), ""}, "", Match{true, false, 20, nil}, 0},
		{"empty payload does not match others", []string{own("a")}, "", Match{}, 1},
		{"the first of two", []string{own("a"), own("b")}, own("a"), Match{true, true, 10, nil}, 1},
		{"the client's after ours answers both", []string{own("a"), "b"}, "b", Match{true, false, 20, nil}, 0},
		{"ours after the client's answers both", []string{"a", own("b")}, own("b"), Match{true, true, 20, [][]byte{[]byte("a")}}, 0},
		{"many are skipped", []string{"a", own("x"), "", "b", own("y"), own("z")}, own("y"), Match{true, true, 50, [][]byte{[]byte("a"), {}, []byte("b")}}, 1},
		{"same payload twice", []string{"a", own("x"), "a"}, "a", Match{true, false, 10, nil}, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			var p Pings
			for i, s := range test.sent {
				if !p.Sent([]byte(s), len(s) > 4, uint64(10*(i+1))) {
					t.Fatalf("got no room for ping %d", i)
				}
			}
			if got := p.Pong([]byte(test.pong)); !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
			if got := p.Unanswered(); got != test.after {
				t.Errorf("got %d own pings waiting, want %d", got, test.after)
			}
			if len(p.waiting) == 0 && p.waiting != nil {
				t.Error("got memory held by an empty queue")
			}
		})
	}
}

func TestSamePayloadTwiceIsAnsweredTwice(t *testing.T) {
	var p Pings
	p.Sent([]byte("a"), false, 1)
	p.Sent([]byte("a"), false, 2)
	for want := uint64(1); want <= 2; want++ {
		if m := p.Pong([]byte("a")); !m.Known || m.Acked != want {
			t.Errorf("got %+v, want position %d", m, want)
		}
	}
	if m := p.Pong([]byte("a")); m.Known {
		t.Errorf("got %+v of a third pong, want no match", m)
	}
}

func TestThereIsAlwaysRoomForOneOwnPing(t *testing.T) {
	var p Pings
	p.Sent(nil, false, 0)
	p.Sent([]byte("own"), true, 1)
	for i := 2; i < maxPings; i++ {
		if !p.Sent(fmt.Appendf(nil, "%d", i), false, uint64(i)) {
			t.Fatalf("got no room for ping %d", i)
		}
	}
	if p.Sent([]byte("64"), false, 64) {
		t.Error("got room for another ping of the client, want it answered by the proxy")
	}
	if !p.Sent([]byte("next"), true, 65) {
		t.Error("got no room for an own ping in place of the own one")
	}
	if len(p.waiting) != maxPings || p.Unanswered() != 1 {
		t.Errorf("got %d waiting, %d own, want %d, 1", len(p.waiting), p.Unanswered(), maxPings)
	}
	if m := p.Pong([]byte("own")); m.Known {
		t.Error("got a match of a ping that made room")
	}
	if m := p.Pong([]byte("next")); !m.Known || len(m.Skipped) != maxPings-1 {
		t.Errorf("got %+v, want the new one, and all of the client's before it", m)
	}
	for i := range maxPings {
		p.Sent(fmt.Appendf(nil, "%d", i), false, uint64(i))
	}
	for _, own := range []string{"own", "next"} {
		if !p.Sent([]byte(own), true, 1) || p.Unanswered() != 1 || len(p.waiting) != maxPings+1 {
			t.Errorf("got %d own pings of %d, want one beside those of the client", p.Unanswered(), len(p.waiting))
		}
	}
}

func TestPayloadsAreCopied(t *testing.T) {
	var p Pings
	payload := []byte("mine")
	p.Sent(payload, false, 1)
	copy(payload, "ruin")
	if !p.Pong([]byte("mine")).Known {
		t.Error("got no match: the payload was not copied")
	}
}

func TestWhenTheBackendIsGoneTheClientsPingsAreAnswered(t *testing.T) {
	var p Pings
	if got := p.Lost(); got != nil {
		t.Errorf("got %q, want nothing", got)
	}
	p.Sent([]byte("a"), false, 1)
	p.Sent([]byte("own"), true, 1)
	p.Sent(nil, false, 2)
	want := [][]byte{[]byte("a"), {}}
	if got := p.Lost(); !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if p.waiting != nil || p.Unanswered() != 0 || p.Pong([]byte("own")).Known {
		t.Error("got pings of the lost backend still waiting")
	}
}

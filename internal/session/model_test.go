// This file lets peers, admins and reloads do things at random and compares what
// arrives with what was sent. HOLDFAST_SEED repeats one run.

package session

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

func TestRandomLives(t *testing.T) {
	first, n := rand.Uint64N(1<<32), uint64(200)
	if s := os.Getenv("HOLDFAST_SEED"); s != "" {
		var err error
		if first, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("HOLDFAST_SEED: %v", err)
		}
		n = 1
	}
	reasons := map[registry.Reason]int{}
	for seed := first; seed < first+n; seed++ {
		t.Run(fmt.Sprintf("HOLDFAST_SEED=%d", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				reasons[liveAtRandom(t, rand.New(rand.NewPCG(seed, 4)))]++
			})
		})
	}
	t.Logf("reasons: %v", reasons)
}

// life is one random life.
type life struct {
	*rig
	rng *rand.Rand

	// What was done, by side.
	open    [2]bool // a fragmented message has begun
	closed  [2]bool
	left    [2]bool // FIN or RST
	offence [2]int  // where in what was sent the protocol was broken; -1: nowhere
	size    [2]int  // of the message that is being sent
	largest [2]int  // of all messages

	settings []Settings // all that were in force
	asked    map[registry.Reason]bool
}

func liveAtRandom(t *testing.T, rng *rand.Rand) registry.Reason {
	l := &life{rng: rng, asked: map[registry.Reason]bool{}, offence: [2]int{-1, -1}}
	with := setup{
		settings: l.randomSettings(),
		buffer:   []int{100, 4 << 10, defaultBuffer}[rng.IntN(3)],
		client:   l.randomManners(), backend: l.randomManners(),
		answers: rng.IntN(2) == 0,
	}
	if rng.IntN(2) == 0 {
		with.endDelay = time.Duration(rng.IntN(20)) * time.Millisecond
	}
	l.rig = start(t, with)
	for range 5 + rng.IntN(40) {
		l.step()
		if rng.IntN(3) > 0 {
			l.pass(l.randomPause())
		}
	}
	l.settle()
	l.check()
	return l.rec.Ending().Reason
}

// settle lets everything that was left to be written arrive.
func (l *life) settle() {
	for _, p := range []*peer{l.client, l.backend} {
		p.behave(func(is *manners) { is.stalled, is.every = false, 0 })
	}
	busy := func(p *peer) bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.queue) > 0
	}
	for range 500 {
		if !l.live() || !busy(l.client) && !busy(l.backend) {
			break
		}
		l.pass(5 * time.Second)
	}
	l.pass(10 * time.Second) // an item may last longer than its place in the queue
}

func (l *life) randomPause() time.Duration {
	scale := []time.Duration{time.Millisecond, 100 * time.Millisecond, time.Second, 10 * time.Second}[l.rng.IntN(4)]
	return time.Duration(l.rng.Int64N(int64(4 * scale)))
}

func (l *life) randomSettings() (s Settings) {
	maybe := func(d time.Duration) time.Duration {
		if l.rng.IntN(4) > 0 {
			return 0
		}
		return d + time.Duration(l.rng.Int64N(int64(d)))
	}
	s = Settings{
		PingInterval: maybe(5 * time.Second), PingTimeout: time.Second + maybe(10*time.Second),
		IdleTimeout: maybe(20 * time.Second), FirstDataTimeout: maybe(10 * time.Second),
		MaxLifetime: maybe(time.Minute), WriteTimeout: maybe(5 * time.Second),
		ClientMaxMessage: int64(maybe(50_000)), ServerMaxMessage: int64(maybe(50_000)),
	}
	l.settings = append(l.settings, s)
	return s
}

func (l *life) randomManners() (is manners) {
	if l.rng.IntN(3) == 0 {
		is.chunk, is.every = 8<<10+l.rng.IntN(50_000), time.Duration(l.rng.IntN(100))*time.Millisecond
	}
	is.mute, is.silent = l.rng.IntN(4) == 0, l.rng.IntN(4) == 0
	return is
}

// step does one thing.
func (l *life) step() {
	side := l.rng.IntN(2)
	p := []*peer{clientSide: l.client, backendSide: l.backend}[side]
	switch n := l.rng.IntN(100); {
	case n < 55:
		l.sendData(side, p)
	case n < 62:
		p.send(p.frame(true, 0, ws.OpPing, l.randomPayload(126)))
	case n < 67:
		p.send(p.frame(true, 0, ws.OpPong, l.randomPayload(126)))
	case n < 79:
		p.stall()
	case n < 90:
		p.resume()
	case n < 92:
		l.change(l.randomSettings())
	case n < 94:
		l.rec.CloseAt(time.Now().Add(l.randomPause()), registry.Ending{Reason: registry.Orphan})
		l.asked[registry.Orphan] = true
	case n < 96:
		l.rec.CloseAt(time.Time{}, registry.Ending{})
	default:
		l.end(l.rng.IntN(14), side, p)
	}
}

func (l *life) sendData(side int, p *peer) {
	op := ws.OpText
	if l.open[side] {
		op = ws.OpContinuation
	} else if l.rng.IntN(2) == 0 {
		op = ws.OpBinary
	}
	sizes := []int{1, 100, 100, 1000, 1000, 5000, 20_000, 100_000}
	fin := l.rng.IntN(3) > 0
	payload := l.randomPayload(sizes[l.rng.IntN(len(sizes))])
	wire := p.frame(fin, 0, op, payload)
	if !l.open[side] {
		l.size[side] = 0
	}
	l.size[side] += len(payload)
	l.largest[side] = max(l.largest[side], l.size[side])
	l.open[side] = !fin
	if l.rng.IntN(2) == 0 {
		p.send(wire)
		return
	}
	p.sendInPieces(wire, 1+len(wire)/(1+l.rng.IntN(8)), time.Duration(l.rng.IntN(1000))*time.Millisecond)
}

func (l *life) randomPayload(n int) []byte {
	b := make([]byte, l.rng.IntN(n))
	for i := range b {
		b[i] = byte(i ^ len(b))
	}
	return b
}

// end causes an end.
func (l *life) end(how, side int, p *peer) {
	switch how {
	case 0, 1, 2:
		if l.closed[side] {
			return
		}
		l.closed[side] = true
		p.sendClose([]uint16{1000, 1001, 1005, 3000, 4999}[l.rng.IntN(5)], "")
		if l.rng.IntN(2) == 0 {
			p.sendFIN()
		}
	case 3, 4:
		l.left[side] = true
		p.sendFIN()
	case 5, 6:
		l.left[side] = true
		p.conn.Reset()
	case 7, 8:
		p.mu.Lock()
		if l.offence[side] < 0 {
			l.offence[side] = len(p.sent)
		}
		p.mu.Unlock()
		p.send(p.frame(true, 0, ws.OpCode(3), nil))
	case 9, 10, 11:
		l.asked[registry.Admin] = true
		go l.rec.Close(registry.Ending{Reason: registry.Admin, Code: 4000, Text: "moved"})
	default:
		l.asked[registry.Shutdown] = true
		ctx, cancel := context.WithTimeout(context.Background(), l.randomPause())
		go func() {
			defer cancel()
			l.reg.Shutdown(ctx)
		}()
	}
}

// check compares what has arrived with what was sent, and how the life ended
// with what was done.
func (l *life) check() {
	l.t.Helper()
	for _, way := range []struct {
		name     string
		from, to *peer
		offence  int
	}{
		{"to the backend", l.client, l.backend, l.offence[clientSide]},
		{"to the client", l.backend, l.client, l.offence[backendSide]},
	} {
		way.from.mu.Lock()
		sent := way.from.sent
		way.from.mu.Unlock()
		if way.offence >= 0 {
			sent = sent[:way.offence]
		}
		want := l.tokens(sent, ws.OpPong)
		got := l.tokens(way.to.wire(), ws.OpPing)
		same := 0
		for same < min(len(got), len(want)) && got[same] == want[same] {
			same++
		}
		if same < len(got) {
			l.t.Errorf("%s: got %v, want %v, after %d tokens of %d", way.name, got[same], at(want, same), same, len(want))
		}
		if l.live() && len(got) < len(want) {
			l.t.Errorf("%s: got %d tokens, want all %d while the session lives", way.name, len(got), len(want))
		}
		wantLegal(l.t, way.name, way.to)
		l.wantNoneTooBig(way.name, way.to)
		way.to.farewell(l.t)
	}
	if l.live() {
		for side := range 2 {
			if l.closed[side] || l.left[side] || l.offence[side] >= 0 {
				l.t.Errorf("got the session open though side %d ended (close %v, FIN or RST %v, offence %v)",
					side, l.closed[side], l.left[side], l.offence[side] >= 0)
			}
		}
		l.rec.Close(registry.Ending{Reason: registry.Admin})
		l.asked[registry.Admin] = true
	}
	l.wait(time.Minute)
	if took := l.ended.Sub(l.endedAt); took > registry.ClosingTimeout+l.endDelay+time.Millisecond {
		l.t.Errorf("got Run back %v after the end began, want 5s at most", took)
	}
	if !l.plausible(l.rec.Ending().Reason) {
		l.t.Errorf("got reason %q, which nothing gave rise to", l.rec.Ending().Reason)
	}
}

// plausible reports whether something was done that explains a reason.
func (l *life) plausible(reason registry.Reason) bool {
	was := func(on func(s Settings) bool) bool { return slices.ContainsFunc(l.settings, on) }
	switch reason {
	case registry.ClientClosed:
		return l.closed[clientSide]
	case registry.BackendClosed:
		return l.closed[backendSide]
	case registry.ClientGone:
		return l.left[clientSide]
	case registry.BackendLost:
		return l.left[backendSide] || was(func(s Settings) bool { return s.PingInterval > 0 || s.WriteTimeout > 0 })
	case registry.ClientProtocol:
		return l.offence[clientSide] >= 0
	case registry.BackendBroke:
		return l.offence[backendSide] >= 0
	case registry.PingTimeout:
		return was(func(s Settings) bool { return s.PingInterval > 0 })
	case registry.TooBig:
		return was(func(s Settings) bool {
			return s.ClientMaxMessage > 0 && l.largest[clientSide] > int(s.ClientMaxMessage) ||
				s.ServerMaxMessage > 0 && l.largest[backendSide] > int(s.ServerMaxMessage)
		})
	case registry.WriteTimeout:
		return was(func(s Settings) bool { return s.WriteTimeout > 0 })
	case registry.Idle:
		return was(func(s Settings) bool { return s.IdleTimeout > 0 })
	case registry.NoData:
		return was(func(s Settings) bool { return s.FirstDataTimeout > 0 })
	case registry.Lifetime:
		return was(func(s Settings) bool { return s.MaxLifetime > 0 })
	default:
		return l.asked[reason]
	}
}

// token is a byte of a message or of a control frame, or where one begins or ends.
type token uint16

const (
	tokenEnd   token = 0x100
	tokenBegin token = 0x200 // + opcode
)

func (t token) String() string {
	switch {
	case t >= tokenBegin:
		return fmt.Sprintf("begin of opcode %d", t-tokenBegin)
	case t == tokenEnd:
		return "end"
	default:
		return fmt.Sprintf("byte %#x", uint16(t))
	}
}

func at(tokens []token, i int) any {
	if i < len(tokens) {
		return tokens[i]
	}
	return "nothing"
}

// tokens tells of a stream what has to stay as it is whatever its frames are cut
// into, up to the first close frame. The session's own frames, whose payload is
// its nonce, are left out, and so are the client's pings and the pongs to them: a
// client that takes nothing is answered by the session (see wantPonged).
func (l *life) tokens(wire []byte, own ws.OpCode) (all []token) {
	for len(wire) > 0 {
		head, size, ok := parseHeader(wire)
		if !ok || head.OpCode == ws.OpClose {
			return all
		}
		payload := slices.Clone(wire[size:min(len(wire), size+int(head.Length))])
		wire = wire[size+len(payload):]
		if head.Masked {
			ws.Cipher(payload, head.Mask, 0)
		}
		whole := len(payload) == int(head.Length)
		clients := head.OpCode == ws.OpPing && head.Masked || head.OpCode == ws.OpPong && !head.Masked
		if head.OpCode.IsControl() && (!whole || clients || head.OpCode == own && l.session.own.has(payload)) {
			continue
		}
		if head.OpCode != ws.OpContinuation {
			all = append(all, tokenBegin+token(head.OpCode))
		}
		for _, b := range payload {
			all = append(all, token(b))
		}
		if whole && head.Fin {
			all = append(all, tokenEnd)
		}
	}
	return all
}

// wantLegal checks that what arrived is a legal sequence of frames.
func wantLegal(t *testing.T, way string, p *peer) {
	t.Helper()
	open := false
	for i, f := range p.received() {
		legal := f.head.Masked != p.masked && f.head.Rsv == 0
		if f.head.OpCode.IsControl() {
			legal = legal && f.head.Fin && f.head.Length <= 125
		} else {
			legal = legal && open == (f.head.OpCode == ws.OpContinuation)
			open = !f.head.Fin
		}
		if !legal {
			t.Errorf("%s: got frame %d %+v, want a legal sequence", way, i, f.head)
			return
		}
	}
}

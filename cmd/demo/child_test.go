package main

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// A child re-executes its own binary, which in a test is the test binary;
// startDemo does the same on purpose, to have the race detector in the demo.
func TestMain(m *testing.M) {
	if os.Getenv("HOLDFAST_DEMO_MAIN") == "1" || len(os.Args) > 1 && os.Args[1] == "backend" {
		main()
	}
	os.Exit(m.Run())
}

func TestBackendGreetsAndEchoes(t *testing.T) {
	c := startedChild(t, "alder")
	conn := dial(t, c.address(), http.Header{"Holdfast-Connection": {"abc"}, "Holdfast-Resume": {"attempt=1"}})
	if got, want := conn.Subprotocol(), subprotocol; got != want {
		t.Errorf("got subprotocol %q, want %q", got, want)
	}
	if got, want := receive[hello](t, conn), (hello{Backend: "alder", Connection: "abc", Resume: "attempt=1"}); got != want {
		t.Errorf("got greeting %+v, want %+v", got, want)
	}
	for i, text := range []string{"hello", "", "\"quoted\" <b>ünïcode</b>"} {
		if err := conn.Write(t.Context(), websocket.MessageText, []byte(text)); err != nil {
			t.Fatal(err)
		}
		if got, want := receive[answer](t, conn), (answer{Backend: "alder", Text: text, N: i + 1}); got != want {
			t.Errorf("got answer %+v, want %+v", got, want)
		}
	}
}

func TestBackendRefusesBinary(t *testing.T) {
	conn := dial(t, startedChild(t, "alder").address(), nil)
	receive[hello](t, conn)
	if err := conn.Write(t.Context(), websocket.MessageBinary, []byte{1}); err != nil {
		t.Fatal(err)
	}
	if got, want := closeStatus(t, conn), websocket.StatusUnsupportedData; got != want {
		t.Errorf("got close code %d, want %d", got, want)
	}
}

func TestBackendEndsWithItsStdin(t *testing.T) {
	c := startedChild(t, "alder")
	conn := dial(t, c.address(), nil)
	receive[hello](t, conn)

	if err := c.current().stdin.Close(); err != nil {
		t.Fatal(err)
	}
	if got, want := closeStatus(t, conn), websocket.StatusGoingAway; got != want {
		t.Errorf("got close code %d, want %d", got, want)
	}
	awaitEnd(t, c)
	if err := c.wait(); err != nil {
		t.Errorf("got %v, want a clean exit", err)
	}
	if conn, err := net.Dial("tcp", c.address()); err == nil {
		conn.Close()
		t.Error("the backend still listens")
	}
}

func TestChildStartsAgainOnItsAddress(t *testing.T) {
	c := startedChild(t, "alder")
	addr, pid := c.address(), c.pid()
	if err := c.start(); err == nil {
		t.Error("starting a running child succeeded")
	}

	c.kill()
	awaitEnd(t, c)
	if c.wait() == nil {
		t.Error("a killed child counts as ended in good order")
	}
	if err := c.start(); err != nil {
		t.Fatal(err)
	}
	if got, want := c.address(), addr; got != want {
		t.Errorf("got address %s, want the first one, %s", got, want)
	}
	if c.pid() == pid {
		t.Error("the process is still the old one")
	}
	receive[hello](t, dial(t, c.address(), nil))

	c.stop()
	c.stop() // does nothing
	if err := c.wait(); err != nil {
		t.Errorf("got %v, want a clean exit", err)
	}
}

func TestChildReportsAnAddressInUse(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c := newChild("alder")
	c.listen = ln.Addr().String()
	if err := c.start(); err == nil {
		c.stop()
		t.Error("starting on a taken address succeeded")
	}
}

func startedChild(t *testing.T, name string) *child {
	t.Helper()
	c := newChild(name)
	if err := c.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.stop)
	return c
}

func awaitEnd(t *testing.T, c *child) {
	t.Helper()
	select {
	case <-c.current().done:
	case <-time.After(10 * time.Second):
		t.Fatalf("backend %s has not ended", c.name)
	}
}

func dial(t *testing.T, addr string, header http.Header) *websocket.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn, _, err := websocket.Dial(ctx, "ws://"+addr+"/ws", &websocket.DialOptions{
		HTTPHeader:   header,
		Subprotocols: []string{subprotocol},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.CloseNow() })
	return conn
}

func receive[M any](t *testing.T, conn *websocket.Conn) (message M) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, payload, err := conn.Read(ctx)
	if err == nil {
		err = json.Unmarshal(payload, &message)
	}
	if err != nil {
		t.Fatal(err)
	}
	return message
}

func closeStatus(t *testing.T, conn *websocket.Conn) websocket.StatusCode {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, payload, err := conn.Read(ctx)
	var closed websocket.CloseError
	if !errors.As(err, &closed) {
		t.Fatalf("got message %q, error %v; want a close frame", payload, err)
	}
	return closed.Code
}

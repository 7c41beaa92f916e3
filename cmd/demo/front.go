// This file holds the front: the small HTTP server, behind Caddy, that has
// the page and what the page asks the demo itself.
package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"
)

//go:embed index.html
var page []byte

// pagePolicy keeps the promise that the page needs nothing from outside, and
// lets no text of a message become script.
const pagePolicy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; " +
	"img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

type front struct {
	children []*child
	listener net.Listener
	server   *http.Server
	done     chan struct{} // closed by serve
}

// startFront serves on a free port until stop.
func startFront(children ...*child) (*front, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("serving the page: %w", err)
	}
	f := &front{children: children, listener: ln, done: make(chan struct{})}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", f.servePage)
	mux.HandleFunc("GET /backends", f.serveBackends)
	f.server = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go f.serve()
	return f, nil
}

// serve owns the listener; stop ends it, and it closes done.
func (f *front) serve() {
	defer close(f.done)
	if err := f.server.Serve(f.listener); !errors.Is(err, http.ErrServerClosed) {
		fmt.Fprintln(os.Stderr, "demo: serving the page:", err)
	}
}

func (f *front) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if f.server.Shutdown(ctx) != nil {
		_ = f.server.Close()
	}
	<-f.done
}

func (f *front) address() string {
	return f.listener.Addr().String()
}

func (f *front) servePage(w http.ResponseWriter, _ *http.Request) {
	header := w.Header()
	header.Set("Content-Type", "text/html; charset=utf-8")
	header.Set("Content-Security-Policy", pagePolicy)
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Cache-Control", "no-cache")
	_, _ = w.Write(page)
}

// serveBackends tells the names of the backends' addresses.
func (f *front) serveBackends(w http.ResponseWriter, _ *http.Request) {
	type entry struct {
		Name    string `json:"name"`
		Address string `json:"address"`
	}
	list := make([]entry, len(f.children))
	for i, c := range f.children {
		list[i] = entry{Name: c.name, Address: c.address()}
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(list)
}
